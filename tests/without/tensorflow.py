"""In front of the real one: a program of the tests doesn't wait for it."""

raise ImportError("The tests start programs on other backends without it.")
