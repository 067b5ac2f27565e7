# The everyday commands.
.PHONY: install train test slow lint format types
install:
	python -m pip install -e '.[test]'
train:
	python -m dpo.train
test:
	python -m pytest -n 2
slow:
	python -m pytest -m slow
lint:
	ruff check . && ruff format --check .
format:
	ruff format . && ruff check --fix .
types:
	mypy
