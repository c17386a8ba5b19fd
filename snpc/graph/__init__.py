"""What snpc adds to onnx-ir: shapes, walks, subgraphs and costs of graphs.

Files
  binding          Sizes for the dynamic dimensions of a graph's inputs.
  builder          Adds constants and nodes to a graph, under names that are free, and redirects uses to what was added.
  column_selection Selections of columns of a table that heads share: how one is written into a graph, and found again.
  constant_values  The contents of values that a graph computes from shapes and constants only.
  cost             What a model costs in multiply-accumulates, from shapes and the operator table, without running it.
  decoder_names    Names of a decoder's inputs and outputs, by which exporters and runtimes know them.
  measured_shapes  Shapes that inference cannot know, read from one run of the graph.
  module_paths     Readable, stable names for groups, from what the exporter called nodes and weights.
  pass_manager     What a graph pass is, and how a list of passes is run: data, so that passes can be listed, and
                   watched one by one.
  shapes           Concrete shapes: bind dynamic axes to small sizes and evaluate, node by node, shapes and shape
                   arithmetic.
  size_search      Solves for sizes of dynamic dimensions that a graph takes, from what its nodes demand.
  subgraph         Segments of a graph: contiguous nodes in topological order, with their inputs and outputs.
  traversal        Walks over a graph: what a node reads, what lies upstream and downstream of a value.
  union_find       Union-find: connected components of pairs of integers, or of any hashable members.
"""

from __future__ import annotations

from snpc.graph.binding import (
    DimSizes,
    alternative_dim_sizes,
    base_dim_sizes,
    coprime_dim_sizes,
    dynamic_axes,
    leading_dims,
)
from snpc.graph.builder import (
    Attribute,
    add_constant,
    copy_node,
    make_node,
    redirect_uses,
    replace_graph_output,
    replace_value,
    share_int64_constant,
    unused_name,
)
from snpc.graph.column_selection import (
    ColumnSelection,
    analyzed_selection,
    nodes_for_analysis,
    nodes_for_file,
    selected_table,
    selects_columns,
    stored_selection,
)
from snpc.graph.constant_values import is_constant_along
from snpc.graph.cost import contraction_sizes, cost_of, count_macs, node_macs, parameter_count
from snpc.graph.decoder_names import BRANCH_INPUT, DecoderInput, decoder_input, find_presents, is_cache_name
from snpc.graph.measured_shapes import MeasuredValue, register_shape_source
from snpc.graph.module_paths import common_module_path, module_path, unique_names
from snpc.graph.pass_manager import (
    GraphPass,
    MalformedGraphError,
    PassObserver,
    error_summary,
    malformed_graph_errors,
    run_library_pass,
    run_pass,
    run_passes,
)
from snpc.graph.shapes import (
    ShapeFacts,
    attribute_values,
    has_subgraphs,
    infer_graph,
    infer_node,
    infer_nodes,
    initial_facts,
    is_float,
    opset_version,
    record_constant,
    run_reference,
    select_dimensions,
    shape_source,
    static_shape,
    unknown_shape_reason,
    weight_bytes,
)
from snpc.graph.size_search import choose_dim_sizes, trial_dim_sizes
from snpc.graph.subgraph import Segment, extract_segment, split_into_segments
from snpc.graph.traversal import (
    ScalarFactor,
    ancestor_nodes,
    data_dependent_values,
    dependent_values,
    is_stored_constant,
    movement_behind,
    movement_root,
    reads_only_shape,
    scalar_factor_of,
    step_upstream,
    used_values,
)
from snpc.graph.union_find import connected_components, number_components

__all__ = [
    "BRANCH_INPUT",
    "Attribute",
    "ColumnSelection",
    "DecoderInput",
    "DimSizes",
    "GraphPass",
    "MalformedGraphError",
    "MeasuredValue",
    "PassObserver",
    "ScalarFactor",
    "Segment",
    "ShapeFacts",
    "add_constant",
    "alternative_dim_sizes",
    "analyzed_selection",
    "ancestor_nodes",
    "attribute_values",
    "base_dim_sizes",
    "choose_dim_sizes",
    "common_module_path",
    "connected_components",
    "contraction_sizes",
    "coprime_dim_sizes",
    "copy_node",
    "cost_of",
    "count_macs",
    "data_dependent_values",
    "decoder_input",
    "dependent_values",
    "dynamic_axes",
    "error_summary",
    "extract_segment",
    "find_presents",
    "has_subgraphs",
    "infer_graph",
    "infer_node",
    "infer_nodes",
    "initial_facts",
    "is_cache_name",
    "is_constant_along",
    "is_float",
    "is_stored_constant",
    "leading_dims",
    "make_node",
    "malformed_graph_errors",
    "module_path",
    "movement_behind",
    "movement_root",
    "node_macs",
    "nodes_for_analysis",
    "nodes_for_file",
    "number_components",
    "opset_version",
    "parameter_count",
    "reads_only_shape",
    "record_constant",
    "redirect_uses",
    "register_shape_source",
    "replace_graph_output",
    "replace_value",
    "run_library_pass",
    "run_pass",
    "run_passes",
    "run_reference",
    "scalar_factor_of",
    "select_dimensions",
    "selected_table",
    "selects_columns",
    "shape_source",
    "share_int64_constant",
    "split_into_segments",
    "static_shape",
    "step_upstream",
    "stored_selection",
    "trial_dim_sizes",
    "unique_names",
    "unknown_shape_reason",
    "unused_name",
    "used_values",
    "weight_bytes",
]
