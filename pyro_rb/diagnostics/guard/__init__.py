# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Keeps numbers that are not finite away from the parameters, and says where they began."""
