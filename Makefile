# What is done by hand now and then. `make PYTHON=...` for another interpreter; fastbn must be installed in it.
PYTHON ?= python3

.PHONY: help test lint demo numerics soak fuzz sanitize oldest bench-table bench-quick asv-check dashboard

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | column -t -s:

test:  ## the tests
	$(PYTHON) -P -m pytest

lint:  ## ruff, cython-lint, mypy
	$(PYTHON) -m ruff check .
	cython-lint fastbn
	$(PYTHON) -m mypy

demo:  ## train on real digits, draw the curves
	$(PYTHON) -P -m fastbn demo

soak:  ## try all that may go wrong, write docs/reliability.md; some 25 minutes
	$(PYTHON) tests/soak.py --markdown docs/reliability.md

fuzz:  ## 20,000 new examples of arguments
	$(PYTHON) tests/soak.py --only fuzz

sanitize:  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Linux)
	$(PYTHON) tests/soak.py --only sanitizers

oldest:  ## build without network with the oldest build requirements, test with the oldest versions of everything
	$(PYTHON) -m venv build/oldest-build
	build/oldest-build/bin/pip install -q -r tests/oldest-build.txt wheel
	rm -rf build/oldest-dist
	build/oldest-build/bin/pip wheel -q --no-build-isolation --no-index --no-deps -w build/oldest-dist .
	$(PYTHON) tests/check_wheel.py build/oldest-dist/*.whl
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/pip install -q -r tests/oldest.txt build/oldest-dist/*.whl
	build/oldest/bin/python -P -m pytest -q

bench-table:  ## measure everything, write docs/benchmarks.md, its picture, the README's figures; needs a quiet machine
	$(PYTHON) -P -m fastbn bench --markdown docs/benchmarks.md --plot docs/benchmarks.png --headline README.md

bench-quick:  ## the same in short, on small arrays, on the terminal
	$(PYTHON) -P -m fastbn bench --quick

numerics:  ## measure the errors on hard data, write docs/numerics.md; three minutes; fails where the bound is missed
	$(PYTHON) -P -m fastbn accuracy --markdown docs/numerics.md

asv-check:  ## import the asv suite and check it
	$(PYTHON) -m asv check -E existing:$(shell command -v $(PYTHON))

dashboard:  ## measure the last eight commits, each in its own environment, and make the pages; then `asv preview`
	$(PYTHON) -m asv machine --yes
	git rev-list --first-parent --max-count=8 HEAD | $(PYTHON) -m asv run --skip-existing-successful HASHFILE:-
	$(PYTHON) -m asv publish
