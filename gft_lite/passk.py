import random
from math import comb


def pass_at_k(n, correct, k):
    return 1 - comb(n - correct, k) / comb(n, k)


def mean_pass_at_k(counts, k):
    return sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)


def bootstrap_interval(values, *, level=0.95, resamples=2000, seed=0):
    r = random.Random(seed)
    m = sorted(sum(r.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return m[int(resamples * 0.025)], m[int(resamples * 0.975)]
