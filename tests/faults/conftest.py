def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="inject as many faults as `python -m tests.faults --long` does")
    parser.addoption("--faults-seed", type=int, default=0)
