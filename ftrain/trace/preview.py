"""Preview loops, which run a part of a step ahead of it, must not draw random numbers.

`accumulate` counts before it differentiates. The later draws of the step must not depend on that first loop.
"""

from torch import fx

from ftrain.graph.loop import is_preview, loop_body
from ftrain.graph.op_effects import draws


def strip_preview(loop: fx.Node) -> None:
    """Remove all nodes from the body of a preview loop that its results do not need, random and unknown ops included.

    Other loops stay unchanged. ValueError, with the user's line, if the results need random numbers of torch's
    generator: the step would draw others.
    """
    if not is_preview(loop):
        return
    body = loop_body(loop)
    body.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    body.recompile()
    drawing = [n for n in body.graph.nodes if draws(n)]
    if drawing:
        raise ValueError(
            f"{drawing[0].meta.get('source')}: a count of an accumulated loss, or what it sums over the batch, depends "
            "on random numbers of torch's generator. They are summed before the loss runs, which draws other "
            "numbers: draw from a key (ftrain.bernoulli), or before the step, as a part of the batch"
        )
