"""The asv suite: speed, memory, accuracy and start-up of every commit; asv.conf.json says how they are built."""
