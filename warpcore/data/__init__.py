"""Data: tars are found and indexed into a catalog, the plan names the rows of each micro-batch, workers read them.

`storage` is the only module that touches the places where tars lie, and `expressions` the only one that runs text of a
config, after checking it.
"""
