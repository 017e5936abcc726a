# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What the examples share.

* ``command_line``: options, one-line errors, the start of a script
* ``losses``: the option ``--loss``, and why a loss does not apply
* ``data``: digits, tables for regression, and what is said where a package with data is missing
* ``training``: clocks, and training runs that take turns
* ``bounds``: ELBOs with a standard error
* ``gradients``: draws of gradients, and ratios of their variances
* ``networks``: a Bayesian network and its guides
* ``regression``: such networks in training on tables
* ``results``: tables, and files of results
"""
