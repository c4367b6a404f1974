import numpy as np

from exporters.onnxruntime.rewrites import Float32Boundary
from small_graphs import parse, session


def test_the_host_sees_float32() -> None:
    model = parse("""
        <ir_version: 11, opset_import: ["" : 24]>
        graph (float16[N] x, float16[N] past, int64[N] i) => (float16[N] y, float16[N] present, float16[N] z)
        { y = Add (x, past)
          present = Neg (y)
          z = Neg (present) }
    """)
    rewrite = Float32Boundary(keep=lambda name: name in ("past", "present"))
    assert rewrite(model).modified and rewrite.replaced == 3
    ort_session = session(model)
    assert {v.name: v.type for v in (*ort_session.get_inputs(), *ort_session.get_outputs())} == {
        "x": "tensor(float)",
        "past": "tensor(float16)",
        "i": "tensor(int64)",
        "y": "tensor(float)",
        "present": "tensor(float16)",
        "z": "tensor(float)",
    }
    x = np.array([1.5, 2.0], np.float32)
    y, present, z = ort_session.run(None, {"x": x, "past": x.astype(np.float16), "i": np.zeros(2, np.int64)})
    assert y.tolist() == z.tolist() == [3.0, 4.0] and present.tolist() == [-3.0, -4.0]
