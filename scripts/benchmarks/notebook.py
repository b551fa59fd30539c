"""The notebook's own code, as it stands, but for the names of its globals and the plots."""

from __future__ import annotations

import random

import imagehash
import numpy as np
from benchmarks.common import CANDIDATES, KEEP
from PIL import Image


def notebook_hashes(paths: dict[str, str], image_names: list[str]) -> list[imagehash.ImageHash]:
    img_hash = []
    for name in image_names:
        img_hash.append(imagehash.dhash(Image.open(paths[name])))
    return img_hash


def notebook_get_matches(paths: dict[str, str]) -> list[tuple[str, int]]:
    image_names = list(paths)
    num_samples = min(len(image_names), CANDIDATES)
    image_names = random.sample(image_names, num_samples)
    return notebook_pairs(image_names, notebook_hashes(paths, image_names))


def notebook_pairs(image_names: list[str], img_hash: list[imagehash.ImageHash]) -> list[tuple[str, int]]:
    match_pct = {}
    for i in range(len(img_hash)):
        base_name = image_names[i]
        for j in range(i + 1, len(img_hash)):
            curr_name = image_names[j]
            match_pct[f"{base_name}_{curr_name}"] = img_hash[i] - img_hash[j]

    return sorted(match_pct.items(), key=lambda item: item[1])


def notebook_f(label: tuple[str, dict[str, str]]) -> set[tuple[str, str]]:
    landmark_id, paths = label
    return notebook_keep(notebook_get_matches(paths), landmark_id)


def notebook_keep(match_pct: list[tuple[str, int]], landmark_id: str) -> set[tuple[str, str]]:
    filenames = set()
    for idx in range(len(match_pct)):
        pair = match_pct[-idx]
        id1, id2 = pair[0].split("_")
        filenames.add((id1, landmark_id))
        filenames.add((id2, landmark_id))
        if len(filenames) >= KEEP:
            break
    return filenames


def notebook_only_hashes(label: tuple[str, dict[str, str]]) -> int:
    return len(notebook_hashes(label[1], list(label[1])))


def notebook_choice(hashes: np.ndarray) -> np.ndarray:
    """Positions that the notebook keeps of photos with these hashes, by its own code."""
    images = [imagehash.ImageHash(bits.reshape(8, 8)) for bits in np.unpackbits(hashes, axis=1).astype(bool)]
    image_names = random.sample([str(i) for i in range(len(images))], min(len(images), CANDIDATES))
    chosen = notebook_pairs(image_names, [images[int(name)] for name in image_names])
    return np.array(sorted(int(name) for name, _ in notebook_keep(chosen, "")))
