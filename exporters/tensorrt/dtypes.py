"""TensorRT's element types by the names that manifests and kernels call them."""

TENSORRT_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
NAMES = {dtype: name for name, dtype in TENSORRT_DTYPES.items()}
