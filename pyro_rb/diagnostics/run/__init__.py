# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Runs models, guides and losses, and leaves the world as it was found."""
