import warnings

with warnings.catch_warnings():  # warnings are errors in tests; these are of typer, which Flower imports, about click
    warnings.simplefilter("ignore")
    import flwr.app  # noqa: F401 - so that it is loaded by now
