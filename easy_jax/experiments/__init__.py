"""Experiments with images and with language models: plan, stages, results, workdir.

Tables, figures and pages for people are in `report`.
"""
