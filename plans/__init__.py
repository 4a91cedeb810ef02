"""The words of the project: models, clusters, graphs, strategies, layouts, plans and timelines. Imports nothing of ours."""
