"""What the converter asks of a model's code: which values are read by whom, and what follows what.

The room can be exchanged: whatever reads the code of a model answers these questions, and the rest of ``convert`` asks
nothing else. Code is read by running it on values without content (``capture``), once, on a private copy (``twin``).

    describe                what went wrong while code was read, in words
    AttentionConfig, behind the config of a module whose attention is ours, and what it stands before
    trace_call              a module as it is called once, with these arguments
    HeldCache, is_cache     the cache of keys and values that a call brings along, and what may be one
    trace_with_opaque_parts one part, with what cannot be read in it as single calls
    find_regions            the parts of a model that can be read as a graph, as large as can be, and why others cannot
    Region                  one of them: its module and graph, inputs and defaults, its calls of submodules in order,
                            whether a call asks for what the graph computes; runs the graph and shows every value
    Region.open_call        shows what is inside of a call
    calls, activation_of, ... what one node computes, whichever way it was written
    effect_of               whose memory a node's result shares, and whose it writes
    settle, is_kept, Writes the order of writes: said by the graph, seen by others, in the way of whoever moves a node
    follow, Chain.replace   what follows a node and nothing else reads; one node in its place
    source_of, compiled     the graph as Python code
    fuse_activations, ...   activations that move into the linear layer before them

Graphs are ``torch.fx.Graph``s whose nodes name submodules relative to the region's module. Names stay true while
modules are replaced, so a region is found once and its graph rewritten from step to step.
"""

from tilewright.convert.graph.activations import fuse_activations, fuse_named, fused_activations, unfuse_activations
from tilewright.convert.graph.attention import AttentionConfig, attention_output, behind
from tilewright.convert.graph.caches import ExampleCache, HeldCache, is_cache, update_cache
from tilewright.convert.graph.capture import describe
from tilewright.convert.graph.chain import Chain, Match, Part, activates, added_to, follow
from tilewright.convert.graph.codegen import compiled, flattened, source_of
from tilewright.convert.graph.effects import Effect, effect_of
from tilewright.convert.graph.leaves import has_hooks, is_known, is_norm
from tilewright.convert.graph.memory import Writes, is_kept, settle
from tilewright.convert.graph.patterns import (
    Modules,
    activation_of,
    addends,
    argument,
    calls,
    globally_pooled,
    is_identity,
    module_of,
    pads_by_input_size,
    reshape_views,
    zero_padding,
)
from tilewright.convert.graph.tracing import (
    Region,
    Watch,
    bind_call,
    call_forward,
    find_regions,
    trace_call,
    trace_with_opaque_parts,
)
from tilewright.convert.graph.values import NotAsExpected, Untraceable
