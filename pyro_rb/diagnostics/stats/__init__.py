# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Statistics of gradient samples: tensors in, tensors and numbers out. Knows neither models nor Pyro."""
