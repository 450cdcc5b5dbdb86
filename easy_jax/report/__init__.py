"""Reports of experiments and of the theory: tables, figures and single-file HTML pages.

The numbers are computed in `experiments` and `theory`.
"""
