"""Makes tests/golden/mtcnn.safetensors and weights/mtcnn/model.safetensors from facenet-pytorch.

Run it where facenet-pytorch, scikit-image and matplotlib are installed; nothing of fairref is used.
For each photograph of `photographs`: boxes (M, 4), probability (M,) and landmarks (M, 5, 2), most probable first.
The other file holds the three networks' weights, which that package ships, under pnet., rnet. and onet.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("mtcnn.safetensors")
WEIGHTS = Path(__file__).parents[2] / "weights" / "mtcnn" / "model.safetensors"


def turned(image, degrees):
    """The image turned about its middle, nearest pixels, black outside."""
    H, W = image.shape[:2]
    y, x = np.mgrid[:H, :W] - np.array([H - 1, W - 1])[:, None, None] / 2
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    column = np.rint(c * x - s * y + (W - 1) / 2).astype(int)
    row = np.rint(s * x + c * y + (H - 1) / 2).astype(int)
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    return np.where(inside[..., None], image[row.clip(0, H - 1), column.clip(0, W - 1)], 0).astype(np.uint8)


def photographs():
    """{name: (H, W, 3) uint8}: photographs that packages ship, and pictures made of them with numpy alone."""
    from matplotlib import cbook
    from PIL import Image
    from skimage import data

    astronaut, coffee, cat = data.astronaut(), data.coffee(), data.chelsea()
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        admiral = np.asarray(Image.open(file).convert("RGB"))
    camera = np.repeat(data.camera()[..., None], 3, 2)
    pair = np.zeros((512, 512 + 256, 3), np.uint8)
    pair[:, :512], pair[:300, 512:] = astronaut, admiral[::2, ::2][:300, :256]
    return {
        "astronaut": astronaut,
        "admiral": admiral,
        "camera": camera,
        "coffee": coffee,
        "cat": cat,
        "small": astronaut[::2, ::2],
        "smaller": admiral[::4, ::4],
        "larger": astronaut[:256, 96:352].repeat(3, 0).repeat(3, 1),
        "mirrored": astronaut[:, ::-1],
        "dark": (astronaut * 0.35).astype(np.uint8),
        "turned": turned(astronaut, 15),
        "upside down": admiral[::-1, ::-1],
        "tiled": np.tile(astronaut[:256, :400], (2, 2, 1)),
        "cut": astronaut[60:, 200:],
        "pair": pair,
        "tiny": astronaut[:10, :10],
    }


def main():
    import torch
    from facenet_pytorch import MTCNN
    from safetensors.torch import save_file

    peer, tensors = MTCNN(keep_all=True, device="cpu"), {}
    for name, image in photographs().items():
        boxes, probability, landmarks = None, None, None
        if min(image.shape[:2]) >= 20:  # the peer fails on what holds no window
            boxes, probability, landmarks = peer.detect(np.ascontiguousarray(image), landmarks=True)
        if boxes is None:
            boxes, probability, landmarks = (
                np.zeros((0, 4)),
                np.zeros(0),
                np.zeros((0, 5, 2)),
            )
        found = {"boxes": boxes, "probability": probability, "landmarks": landmarks}
        found = {key: np.asarray(value, np.float32) for key, value in found.items()}
        order = np.argsort(-found["probability"], kind="stable")
        tensors |= {f"{name}.{key}": torch.from_numpy(value[order]) for key, value in found.items()}
        print(name, found["boxes"][order].round().tolist(), found["probability"][order])
    save_file(tensors, FILE)
    networks = {"pnet": peer.pnet, "rnet": peer.rnet, "onet": peer.onet}
    save_file(
        {
            f"{name}.{key}": w.contiguous()
            for name, net in networks.items()
            for key, w in net.state_dict().items()
        },
        WEIGHTS,
        metadata={"format": "pt"},
    )


if __name__ == "__main__":
    main()
