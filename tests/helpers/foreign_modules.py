"""Modules as users write them, by name, each with what makes a batch for it."""

import torch
import torch.nn.functional as F
from torch import nn

D, N, T = 6, 4, 3


def rows():
    return torch.randn(N, D)


def sequence():
    return torch.randn(N, T, D)


def image():
    return torch.randn(2, 4, 8, 8)


def ids():
    return torch.randint(0, 7, (N, T))


class Pick(nn.Module):
    """The first of a module's results."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)[0]


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, under a causal mask."""

    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 2, batch_first=True, **options)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.inner(x, x, x, attn_mask=mask)[0]


class Translate(nn.Module):
    """An encoder and a decoder, of one sequence."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Transformer(D, 2, 1, 1, 8, batch_first=True)

    def forward(self, x):
        return self.inner(x, x)


class Tied(nn.Module):
    """One table at both ends."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, D)
        self.head = nn.Linear(D, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.table(x)))


class Rotary(nn.Module):
    """Caches its angles by length."""

    def __init__(self):
        super().__init__()
        self.w, self.cache, self.length = nn.Linear(D, D), None, 0

    def forward(self, x):
        if self.cache is None or self.length < x.shape[1]:
            self.length = x.shape[1]
            self.cache = torch.outer(torch.arange(self.length, dtype=x.dtype), torch.ones(D // 2, dtype=x.dtype))
        a, b = self.w(x).chunk(2, -1)
        return torch.cat([a * self.cache.cos() - b * self.cache.sin(), a * self.cache.sin() + b * self.cache.cos()], -1)


class Squeeze(nn.Module):
    """A residual block with squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return x + y * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(y, 1)))))


class UNet(nn.Module):
    """Down, up, and a skip."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        return x + self.up(F.gelu(self.down(x)))


class TopK(nn.Module):
    """Routes each token to two of three experts, by a loop."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * (weight * (chosen == i)).sum(-1, keepdim=True)
        return out


MODULES = {
    "linear": (nn.Linear(D, 3), rows),
    "mlp": (nn.Sequential(nn.Linear(D, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), rows),
    "bilinear": (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(D, 4)), rows),
    "activations": (nn.Sequential(nn.Linear(D, D), nn.ELU(), nn.Hardswish(), nn.PReLU(), nn.Mish(), nn.GLU()), rows),
    "softplus": (nn.Sequential(nn.Linear(D, D), nn.Softplus(), nn.Softshrink(), nn.LogSoftmax(-1)), rows),
    "dropout": (nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.3), nn.Linear(8, D)), rows),
    "alpha dropout": (nn.Sequential(nn.Linear(D, D), nn.SELU(), nn.AlphaDropout(0.3)), rows),
    "dropout2d": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5)), image),
    "rrelu": (nn.Sequential(nn.Linear(D, D), nn.RReLU()), rows),
    "layer norm": (nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), rows),
    "rms norm": (nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D)), rows),
    "instance norm": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True)), image),
    "batch norm without statistics": (
        nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=False)),
        rows,
    ),
    "batch norm in evaluation": (nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval(), rows),
    "local response norm": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.LocalResponseNorm(2)), image),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(D, 3)), rows),
    "orthogonal": (nn.utils.parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="cayley"), rows),
    "conv1d": (nn.Sequential(nn.Conv1d(T, 3, 3), nn.MaxPool1d(2)), sequence),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 2, 2, dilation=2)), image),
    "conv3d": (nn.Sequential(nn.Unflatten(0, (1, 2)), nn.Conv3d(2, 2, 2)), image),
    "pads": (nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3), nn.ReplicationPad2d(1)), image),
    "upsample": (nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")), image),
    "pixel shuffle": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2)), image),
    "squeeze and excitation": (Squeeze(), image),
    "unet": (UNet(), image),
    "unfold": (nn.Sequential(nn.Conv2d(4, 2, 1), nn.Unfold(2)), image),
    "embedding": (nn.Embedding(7, D, padding_idx=0), ids),
    "embedding with a norm": (nn.EmbeddingBag(7, D, mode="mean"), ids),
    "tied": (Tied(), ids),
    "lstm": (Pick(nn.LSTM(D, 3, batch_first=True)), sequence),
    "lstm both ways": (Pick(nn.LSTM(D, 3, bidirectional=True, proj_size=2)), sequence),
    "gru with dropout": (Pick(nn.GRU(D, 2, 2, dropout=0.4)), sequence),
    "rnn": (Pick(nn.RNN(D, 3, nonlinearity="relu")), sequence),
    "attention": (SelfAttention(), sequence),
    "attention with dropout": (SelfAttention(dropout=0.3), sequence),
    "attention with biases": (SelfAttention(add_bias_kv=True, add_zero_attn=False), sequence),
    "encoder layer": (nn.TransformerEncoderLayer(D, 2, 8, batch_first=True), sequence),
    "encoder, norm first": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, 2, 8, norm_first=True, activation="gelu"), 2, enable_nested_tensor=False
        ),
        sequence,
    ),
    "transformer": (Translate(), sequence),
    "a cache of angles": (Rotary(), sequence),
    "top-k experts": (TopK(), rows),
    "adaptive pool": (nn.Sequential(nn.Conv2d(4, 2, 1), nn.AdaptiveMaxPool2d(3)), image),
    "fractional pool": (nn.Sequential(nn.Conv2d(4, 2, 1), nn.FractionalMaxPool2d(2, output_size=4)), image),
    "cosine": (nn.Sequential(nn.Linear(D, D), nn.Softmin(-1), nn.Threshold(0.1, 0.0), nn.Softsign()), rows),
    "channels shuffled": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ChannelShuffle(2), nn.CELU()), image),
}
