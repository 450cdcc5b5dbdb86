"""Experiments with images and with language models: plan, stages, results, workdir.

Tables, figures and HTML pages are in `report`.
"""
