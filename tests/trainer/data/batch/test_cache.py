from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.data.batch.cache import Cache


def test_a_value_is_computed_once() -> None:
    cache, made = Cache(100), []

    def make() -> str:
        made.append(1)
        return "value"

    assert [cache.get("key", make, len) for _ in range(3)] == ["value"] * 3
    assert len(made) == 1


def test_the_least_recently_used_is_evicted_first() -> None:
    cache = Cache(2)
    for key in ("a", "b", "a", "c"):
        cache.get(key, lambda key=key: key, len)
    made = []
    for key in ("a", "c", "b"):
        cache.get(key, lambda key=key: made.append(key) or key, len)
    assert made == ["b"]
    assert cache.used_bytes == 2


def test_a_value_larger_than_the_cache_is_not_stored() -> None:
    cache = Cache(2)
    cache.get("a", lambda: "a", len)
    assert cache.get("long", lambda: "long", len) == "long"
    assert cache.used_bytes == 1


def test_an_error_is_not_cached() -> None:
    cache = Cache(10)
    with pytest.raises(KeyError):
        cache.get("a", lambda: {}["a"], len)
    assert cache.get("a", lambda: "a", len) == "a"


def test_the_bound_holds_with_many_threads() -> None:
    cache = Cache(10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: cache.get(key % 37, lambda: "xxx", len), range(2000)))
    assert cache.used_bytes == 9
