"""What every graft's function is, and what its definition is written with."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
from onnxscript import OnnxFunction, values
from torch import Tensor

from surgeon.memory.graft import Graft
from surgeon.memory.rotary import Rotary

OPSET = 24
IR_VERSION = 10
DOMAIN = "surgeon"
op: Any = values.Opset("", OPSET)
domain = values.Opset(DOMAIN, 1)


class GraftFunction(ABC):
    """A graft in exported graphs: the function that says what it computes, and the operator that it is traced as."""

    definition: ClassVar[OnnxFunction]
    """Inputs named `*_mask` are bool, other ones float; attributes are floats."""
    operator: ClassVar[Any]
    """The plain torch definition as one operator (an overload), with the definition's arguments in its order."""

    @abstractmethod
    def call(
        self,
        graft: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor,
        rotary: Rotary | None,
    ) -> Tensor:
        """`graft.attend(...)` as the operator; tensors as `Graft.attend` takes them."""

    def project(self, graft: Graft, visual_embeds: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """`graft.project(...)`, in operators that lower to one ONNX operator each."""
        return graft.project(visual_embeds, rotary)

    @property
    def translation(self) -> Callable[..., Any]:
        """What translates the operator into one node: a schema without a body. Functions with one are inlined by the
        exporter, whose opset conversion does not look into functions.

        Raises TypeError where the function's inputs are not the operator's arguments, by name and in order."""
        schema = onnx.defs.OpSchema
        proto = self.definition.to_function_proto()
        parameters, arguments = [*proto.input, *proto.attribute], [a.name for a in self.operator._schema.arguments]
        if parameters != arguments[: len(parameters)]:
            raise TypeError(f"the function {proto.name} takes {parameters}, and its operator {arguments}")
        types = {name: "tensor(bool)" if name.endswith("_mask") else "T" for name in proto.input}
        op_schema = schema(
            proto.name,
            proto.domain,
            self.definition.opset.version,
            inputs=[schema.FormalParameter(*parameter) for parameter in types.items()],
            outputs=[schema.FormalParameter(name, "T") for name in proto.output],
            type_constraints=[("T", [f"tensor({dtype})" for dtype in ("float", "float16", "bfloat16")], "")],
            attributes=[schema.Attribute(name, schema.AttrType.FLOAT, "") for name in proto.attribute],
        )
        return values.Op(domain, proto.name, op_schema)

    @property
    def function(self) -> ir.Function:
        return ir.from_proto(self.definition.to_function_proto())
