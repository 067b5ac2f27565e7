# The everyday commands.
.PHONY: install train test long slow lint format types
install:
	python -m pip install -e '.[test]'
train:
	python -m dpo.train
test:
	python -m pytest -n 2
long:
	python -m pytest -n 2 -m 'long and not slow'
slow:
	python -m pytest -m slow
lint:
	ruff check . && ruff format --check .
format:
	ruff format . && ruff check --fix .
types:
	mypy
