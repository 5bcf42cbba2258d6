"""Films as files: mp4 by PyAV, and a strip of frames as one picture.

F frames, H and W their height and width in pixels.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

try:
    import av
    from PIL import Image
except ImportError as absent:
    raise ValueError('films are written by PyAV and Pillow: pip install "ftrain-omni[media]"') from absent


def frames_of(video_3FHW: Tensor) -> np.ndarray:
    """A video in [-1, 1] as frames uint8 `[F, H, W, 3]`, rounded."""
    pixels = ((video_3FHW.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return np.ascontiguousarray(pixels.byte().permute(1, 2, 3, 0).numpy())


def write_mp4(file: Path, frames_FHW3: np.ndarray, *, fps: float) -> None:
    """Write frames uint8 `[F, H, W, 3]`, of even height and width, as H.264. ValueError where PyAV cannot; OSError
    where the disk does not take it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        with av.open(str(made), "w", format="mp4") as container:
            stream: Any = container.add_stream("libx264", rate=round(fps))
            stream.height, stream.width = frames_FHW3.shape[1:3]
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
            for frame in frames_FHW3:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(made, file)
    except av.FFmpegError as error:
        raise ValueError(f"{file} cannot be written as mp4: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def write_strip(file: Path, frames_FHW3: np.ndarray, *, most: int = 8) -> None:
    """Write at most so many of the frames uint8 `[F, H, W, 3]`, at equal distances, side by side as PNG. OSError where
    the disk does not take it.
    """
    count = min(most, len(frames_FHW3))
    chosen = np.linspace(0, len(frames_FHW3) - 1, count).round().astype(int)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(frames_FHW3[chosen]), axis=1)).save(file, format="PNG")
