# python3 is all that these need; `check` also wants ruff and mypy.
PYTHON = python3

.PHONY: run test test-cluster test-api check bench sizes clean help

run:  # start a server on port 8989
	$(PYTHON) linger.py

test:  # run all tests, with warnings as errors
	$(PYTHON) -X dev -W error -m unittest

test-cluster:  # run the tests that need rqlite: rqlited of the PATH, or LINGER_TEST_RQLITED
	LINGER_TEST_RQLITED="$${LINGER_TEST_RQLITED:-$$(command -v rqlited)}" \
	    $(PYTHON) -X dev -W error -m unittest -k OnCluster test_linger

test-api:  # check /openapi.json with openapi-spec-validator, and a server against it with schemathesis
	.ci/test-api

check: test  # run all tests, then ruff and mypy
	ruff check .
	ruff format --check .
	mypy --strict linger.py

bench:  # measure the throughput of a server on this machine
	$(PYTHON) linger.py bench

sizes:  # show the lines of each section, and what is too large
	@$(PYTHON) -c "import test_linger; test_linger.print_sizes()"

clean:  # delete what Python, ruff and mypy keep
	$(PYTHON) -c "import shutil; [shutil.rmtree(f, True) for f in ('__pycache__', '.mypy_cache', '.ruff_cache')]"

help:  # show this list
	@$(PYTHON) -c "import re; print(*('make %-12s %s' % target for target in \
	    re.findall(r'(?m)^([\w-]+):.*?# (.+)', open('Makefile').read())), sep='\n')"
