"""How much repeats of one run differ by chance, estimated from the repeats themselves."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

LEAST_REPEATS = 3  # with fewer, the interval is so wide that nothing lies outside it
# Two-sided 99.9 % quantiles of Student's t by degrees of freedom; NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2 (0.9995).
QUANTILES = {1: 636.6, 2: 31.60, 3: 12.92, 4: 8.610, 5: 6.869, 6: 5.959, 7: 5.408, 8: 5.041, 9: 4.781, 10: 4.587, 15: 4.073, 20: 3.850}


def interval(repeats: Sequence[float]) -> tuple[float, float]:
    """The interval that contains one more repeat in 999 of 1,000 cases: mean ± t · s · √(1 + 1/n), the prediction interval of a normal variable
    (Hahn and Meeker, Statistical Intervals, 4.7). `repeats`: at least two."""
    freedom = len(repeats) - 1
    quantile = QUANTILES[max(known for known in QUANTILES if known <= freedom)]
    reach = quantile * stdev(repeats) * math.sqrt(1 + 1 / len(repeats))
    middle = mean(repeats)
    return middle - reach, middle + reach
