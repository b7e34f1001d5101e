"""A backend of ``torch.compile``: ``torch.compile(model, backend="tilewright", options={"recipe": "int8"})``.

It rewrites the graph that Dynamo captured and hands the rest to Inductor. PyTorch finds it through the entry-point
group ``torch_dynamo_backends``, with no import of Tilewright.

    convolutions   conv -> batch-norm -> add -> activation becomes one ``conv2d_fused``
    linear         with a recipe: a linear layer becomes its quantised operator
    norm           layer norm or RMS norm before int8 linear layers becomes one norm that quantises
    epilogue       activation and residual after a quantised linear layer move into it

Only the second changes what is computed, beyond rounding in float, and only on demand.
"""

from tilewright.backend.compiler import tilewright
from tilewright.backend.record import GraphReport, Rewrite, compile_report, forget_reports

__all__ = ["GraphReport", "Rewrite", "compile_report", "forget_reports", "tilewright"]
