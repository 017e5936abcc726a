# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""How many draws does a wanted precision take?"""
