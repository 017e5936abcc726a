# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0
