"""The words of the project: models, clusters, graphs, layouts, plans, timelines. Imports nothing of ours."""
