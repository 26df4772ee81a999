# python3 is all that `run`, `test`, `bench` and `clean` need; `check` also wants ruff and mypy.
PYTHON = python3

.PHONY: run test check bench sizes clean

run:
	$(PYTHON) linger.py

test:
	$(PYTHON) -X dev -W error -m unittest

check: test
	ruff check .
	ruff format --check .
	mypy --strict linger.py

bench:
	$(PYTHON) linger.py bench

sizes:  # lines of each section of linger.py
	@awk '/^# -----/ { banner = !banner; if (banner) { getline; sub(/:.*/, ""); name = $$0 } } \
	    { lines[name]++ } END { for (name in lines) print lines[name] "\t" name }' linger.py | sort -rn

clean:
	rm -rf __pycache__ .mypy_cache .ruff_cache
