"""What a person reads: tables, figures and one-file HTML pages, of experiments and of the theory.

The numbers are made in `experiments` and `theory`.
"""
