"""An autoencoder: a student that keeps what its image is made of, without a teacher (ReffAKD, arXiv 2404.09886)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods import Batch, Features, Method
from distill.objectives import match, of_mean_one
from featcache.models.conv_autoencoder import CHANNELS, SIZE
from featcache.store.layout import EMBEDDING


class Autoencoder(Method):
    """The image itself from the student's embedding, through a decoder; the teacher is not asked (arXiv 2404.09886).

    L = mean over pixels and channels of (decoder(s) − x)², x the image as the student takes it, that is normalised; over
    images, the mean by the rows' weights. The decoder
    mirrors the student `conv_autoencoder`: three transposed 4 × 4 convolutions of stride 2, 48 → 24 → 12 → 3 channels, ReLU between
    them, eight times as wide and high as the map that it begins with. Any other student may be trained too: one whose
    embedding is not 48 × n × n numbers gets a Linear to 48 × 4 × 4 before it. Images of another size than what comes out are
    averaged to that. The decoder is left behind after training.

    The finished student (`run:FOLDER`) is an encoder like any other. In the paper's code, a sigmoid ends the decoder; it
    is of 0…1, where normalised images are not, so that there is none here unless it is asked for. There, images are cropped,
    mirrored and turned by up to 15°; here they are the views of the store.

    Options:
        sigmoid: end the decoder with one, as published.
    """

    kinds = ("image",)

    def __init__(self, teacher_dim: int, student_dim: int, *, sigmoid: bool = False):
        super().__init__()
        first, second, last = CHANNELS
        grid = math.isqrt(student_dim // last)
        layers: list[nn.Module] = []
        if last * grid**2 != student_dim or not grid:
            grid = SIZE // 8
            layers.append(nn.Linear(student_dim, last * grid**2))
        layers.append(nn.Unflatten(1, (last, grid, grid)))
        for inputs, outputs in ((last, second), (second, first), (first, 3)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
        layers[-1:] = [nn.Sigmoid()] if sigmoid else []
        self.decoder, self._size = nn.Sequential(*layers), 8 * grid

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        image = F.adaptive_avg_pool2d(batch.inputs, self._size)
        share = of_mean_one(batch.weight).sqrt()[:, None, None, None]  # squared, it is how much an image counts
        return {"mse": match(share * self.decoder(student[EMBEDDING]), share * image, "mse")}
