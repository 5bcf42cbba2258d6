"""A video and its sound whose tokens are mixed (Qwen2.5-Omni, Qwen3-Omni): checked, and placed.

Numpy on the host. Legend: V tokens of the video, A tokens of its sound, n = V + A.
"""

import numpy as np

from ftrain.modules.mrope import Picture, Scene

_NEAR = 1e-3
"""How far apart in time two tokens may be taken for equally late: processors reckon in other precisions."""


def scene(
    video: Picture, at_V: np.ndarray, at_A: np.ndarray, *, interleave: int | None, exact: bool, room: int
) -> Scene:
    """The places of the tokens `at_V` of a video and `at_A` of its sound.

    `interleave`: as of `ftrain.modules.sounds.SoundConfig`; with it the two tokens in front and the two behind share a
    place each, and are part of the scene. `exact`: places are float32. `room`: tokens of the batch.

    ValueError where the tokens do not lie together or are mixed in another way.
    """
    at_n = np.concatenate([at_V, at_A])
    order_n = np.argsort(at_n)
    if at_n[order_n[-1]] - at_n[order_n[0]] != len(at_n) - 1:
        raise ValueError(_wrong(at_n.min(), "do not stand side by side"))
    kind = np.float32 if exact else np.int64
    sound_A3 = np.arange(len(at_A), dtype=kind)[:, None].repeat(3, axis=1)
    own_n3 = np.concatenate([video.places(kind), sound_A3])
    heard_n = np.arange(len(at_n)) >= len(at_V)
    first = int(at_n.min())
    if interleave is None:
        return Scene(first, own_n3[order_n], _by_time(own_n3[order_n, 0], heard_n[order_n], first))
    stretch_n = np.concatenate([_stretches(own_n3[: len(at_V), 0], interleave), np.arange(len(at_A)) // interleave])
    if (mixed(own_n3[: len(at_V), 0], len(at_A), interleave=interleave) != heard_n[order_n]).any():
        raise ValueError(_wrong(first, f"are not mixed by stretches of {interleave} places in time"))
    late_n = stretch_n == stretch_n.max()
    last = int((late_n & heard_n).sum()) or int(late_n.sum())
    if first < 2 or first + len(at_n) + 2 > room:
        raise ValueError(_wrong(first, "have not two tokens in front and two behind"))
    own_n3 = own_n3[order_n] + 1
    end = own_n3[-last:].max() + 1
    edge = np.ones((2, 3), kind)
    return Scene(first - 2, np.concatenate([0 * edge, own_n3, end * edge]), last=1)


def mixed(time_V: np.ndarray, sound: int, *, interleave: int | None) -> np.ndarray:
    """How the tokens of a video, shown at these places in time, lie among the `sound` tokens of its sound: bool `[n]`,
    where it is heard. `interleave`: as of `scene`.

    >>> "".join("va"[heard] for heard in mixed(np.array([0, 0, 2, 2]), 3, interleave=2).astype(int))
    'vvaavva'
    >>> "".join("va"[heard] for heard in mixed(np.array([0, 1.5]), 3, interleave=None).astype(int))
    'vaava'
    """
    time_A = np.arange(sound)
    heard_n = np.arange(len(time_V) + sound) >= len(time_V)
    if interleave is None:
        late_n = np.concatenate([time_V, time_A])
    else:
        late_n = np.concatenate([_stretches(time_V, interleave), time_A // interleave])
    found: np.ndarray = heard_n[np.lexsort((heard_n, late_n))]
    return found


def _stretches(time_V: np.ndarray, interleave: int) -> np.ndarray:
    """Which stretch of time each token of a video is put into: the next one at most, as processors cut them."""
    place_V = np.arange(len(time_V))
    found: np.ndarray = np.minimum.accumulate(time_V // interleave - place_V) + place_V
    return found


def _by_time(time_n: np.ndarray, heard_n: np.ndarray, first: int) -> int:
    """How many tokens of one kind are left when the other has ended."""
    if (np.diff(time_n) < -_NEAR).any():
        raise ValueError(_wrong(first, "are not mixed by time"))
    changes = np.flatnonzero(heard_n[1:] != heard_n[:-1])
    return len(heard_n) - 1 - int(changes[-1])


def _wrong(first: int, how: str) -> str:
    return (
        f"the tokens of a video and its sound that begin at token {first} {how}: give the tokens that the model's "
        "processor makes, with its seconds of a frame"
    )
