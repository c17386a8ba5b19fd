class Instrument:
    """Appends statistics to a copy of a model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self.values = {str(v.name): v for node in self.model.graph for v in node.outputs}
        self.values |= {str(v.name): v for v in self.model.graph.inputs}
        self.values |= dict(self.model.graph.initializers)
        self.prepared: dict[tuple[str, bytes, int], tuple[ir.Value, Layout]] = {}
        self.count = 0
        self.version = self.model.graph.opset_imports.get("", 17)
        self.model.graph.outputs.clear()

    def op(self, name: str, inputs: list[ir.Value], **attrs: int | list[int]) -> ir.Value:
        self.count += 1
        node = ir.node(name, inputs, attributes=attrs or None, name=f"snpc_measure_{self.count}")
        node.outputs[0].name = f"snpc_measure_{self.count}_out"
        self.model.graph.append(node)
        return node.outputs[0]

    def ints(self, numbers: Iterable[int]) -> ir.Value:
        self.count += 1
        name = f"snpc_measure_{self.count}"
        tensor = ir.Tensor(np.asarray(list(numbers), np.int64), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        self.model.graph.register_initializer(value)
        return value

    def rows(self, probe: Probe, units: int) -> tuple[ir.Value, Layout]:
        """[samples, rows, repeats * units] in float32."""
        key = (probe.tensor, probe.units.tobytes(), units)
        if key not in self.prepared:
            layout = layout_of(probe, units)
            value = self.op("Cast", [self.values[probe.tensor]], to=int(ir.DataType.FLOAT))
            if layout.period:
                shape = self.op("Shape", [value])
                rest = self.op("Slice", [shape, self.ints([1]), self.ints([1 << 30])])
                head = self.ints([-1, layout.period])
                value = self.op("Reshape", [value, self.op("Concat", [head, rest], axis=0)])
            value = self.op("Transpose", [value], perm=[0, *layout.row_axes, *layout.unit_axes])
            total = int(np.prod([self.axis_size(probe, layout, k) for k in layout.unit_axes], dtype=np.int64))
            value = self.op("Reshape", [value, self.ints([0, -1, total])])
            if layout.columns.tolist() != list(range(total)):
                value = self.op("Gather", [value, self.ints(layout.columns.tolist())], axis=2)
            self.prepared[key] = (value, layout)
        return self.prepared[key]

    def axis_size(self, probe: Probe, layout: Layout, axis: int) -> int:
        return int(
            probe.units.shape[axis - 1]
            if layout.period and axis > 1
            else layout.period
            if layout.period
            else probe.units.shape[axis]
        )

    def energy(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        rows, _layout = self.rows(probe, blocks * size)
        squares = self.op("Mul", [rows, rows])
        split = self.op("Reshape", [squares, self.ints([0, -1, blocks, size])])
        return self.total(split)

    def total(self, value: ir.Value) -> ir.Value:
        if self.version >= 13:
            return self.op("ReduceSum", [value, self.ints([1])], keepdims=0)
        return self.op("ReduceSum", [value], axes=[1], keepdims=0)

    def gram(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        rows, _layout = self.rows(probe, blocks * size)
        split = self.op("Reshape", [rows, self.ints([0, -1, blocks, size])])  # repeats become rows
        columns = self.op("Transpose", [split], perm=[0, 2, 3, 1])
        return self.op("MatMul", [columns, self.op("Transpose", [split], perm=[0, 2, 1, 3])])

    def by_block(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, samples, rows, size]."""
        rows, _ = self.rows(probe, blocks * size)
        return self.op("Transpose", [self.op("Reshape", [rows, self.ints([0, -1, blocks, size])])], perm=[2, 0, 1, 3])

    def product(self, value: ir.Value, blocks: int, size: int) -> ir.Value:
        """[blocks, size, size]: X'X over samples and rows."""
        flat = self.op("Reshape", [value, self.ints([blocks, -1, size])])
        return self.op("MatMul", [self.op("Transpose", [flat], perm=[0, 2, 1]), flat])

    def moment(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        return self.product(self.by_block(probe, blocks, size), blocks, size)

    def centred(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """As ``moment``, of rows less the mean of their own sample."""
        value = self.by_block(probe, blocks, size)
        if self.version >= 18:
            mean = self.op("ReduceMean", [value, self.ints([2])], keepdims=1)
        else:
            mean = self.op("ReduceMean", [value], axes=[2], keepdims=1)
        return self.product(self.op("Sub", [value, mean]), blocks, size)

    def sums(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, size + 1]: the sum of the rows, and how many they are."""
        value = self.op("Reshape", [self.by_block(probe, blocks, size), self.ints([blocks, -1, size])])
        one = self.op("Gather", [value, self.ints([0])], axis=2)
        ones = self.op("Exp", [self.op("Sub", [one, one])])
        return self.total(self.op("Concat", [value, ones], axis=2))

    def gap(self, probe: Probe, size: int, value: str, dense: str, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """(sum of unit' gap [1, size, D], sum of gap [1, D]), gap = dense - value, over the rows of a probe that shows
        every unit once, along its last axis; ``dense`` is a new input of the type and shape of ``value``."""
        entering = ir.Value(name=dense, type=ir.TensorType(dtype))
        self.model.graph.inputs.append(entering)
        both = [self.op("Cast", [v], to=int(ir.DataType.FLOAT)) for v in (entering, self.values[value])]
        gap = self.op("Sub", both)
        width = self.op("Slice", [self.op("Shape", [gap]), self.ints([-1]), self.ints([1 << 30])])
        flat = self.op("Reshape", [gap, self.op("Concat", [self.ints([1, -1]), width], axis=0)])
        units = self.op("Reshape", [self.by_block(probe, 1, size), self.ints([1, -1, size])])
        cross = self.op("MatMul", [self.op("Transpose", [units], perm=[0, 2, 1]), flat])
        return cross, self.total(flat)

    def add(self, wanted: Wanted) -> None:
        self.expose(getattr(self, wanted.kind)(wanted.probe, wanted.group.blocks, wanted.group.size), wanted.output)

    def expose(self, value: ir.Value, name: str) -> None:
        value.name = name
        value.dtype = ir.DataType.FLOAT
        self.model.graph.outputs.append(value)


