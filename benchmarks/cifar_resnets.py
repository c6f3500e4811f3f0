"""ResNets for CIFAR-10 (He et al. 2016, arXiv 1512.03385, section 4.2) as encoders and as students, by MODULE:CALLABLE.

Weights: `cifar10-resnets.zip` of the data folder, as akamaster/pytorch_resnet_cifar10 published them; CIFAR_RESNETS says
where they were unpacked.
"""

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.encoder import Encoder
from featcache.inputs.images import Preprocess


class Block(nn.Module):
    def __init__(self, width: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, (planes - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]  # option A: no weights
        return F.relu(out + F.pad(short, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet(nn.Module):
    """6n + 2 layers, 32 px; gives the pooled features, (B, 64)."""

    def __init__(self, n: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (width, planes) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            blocks = [Block(width if i == 0 else planes, planes, 2 if i == 0 < number - 1 else 1) for i in range(n)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(out))).mean((2, 3))


class Classifier(ResNet):
    def __init__(self, n: int):
        super().__init__(n)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        embedding = super().forward(images)
        return {"embedding": embedding, "logits": self.linear(embedding)}


def published(n: int) -> Encoder:
    module, name = Classifier(n), f"resnet{6 * n + 2}"
    module.load_state_dict(load_file(Path(os.environ["CIFAR_RESNETS"]) / f"{name}.safetensors"))
    return Encoder(
        name=f"cifar_resnets:{name}",
        module=module,
        preprocess=Preprocess(resize=32, crop=32, size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        fields={"embedding": 64, "logits": 10},
        output="mean of the last feature map",
    )


def resnet20() -> Encoder:
    return published(3)


def resnet56() -> Encoder:
    return published(9)


def resnet8_student() -> ResNet:
    return ResNet(1)
