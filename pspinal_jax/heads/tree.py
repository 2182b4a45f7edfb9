"""Reading the documented parameter tree of a progressive head, strictly."""

from pspinal_jax.heads.spec import Tree, layer_name


def read_layers(params: Tree, caller: str) -> tuple[list[Tree], Tree]:
    """The entries of layer_1 .. layer_L, and of the output.

    Args:
      params: the documented tree, or one of the same structure (gradients, momenta).
      caller: who asks, for the message.

    Raises:
      ValueError: if `params` is not such a tree.
    """
    layers = [params[layer_name(i)] for i in range(1, len(params) + 1) if layer_name(i) in params]
    wrong = _what_is_wrong(params, layers)
    if wrong:
        raise ValueError(
            f"{caller} expects layer_1 .. layer_L and output, each with kernel and bias, of one progressive head: "
            f"{wrong}; pass the head's own entry of the params collection"
        )
    return layers, params["output"]


def _what_is_wrong(params: Tree, layers: list[Tree]) -> str:
    names = [layer_name(i + 1) for i in range(len(layers))] + ["output"]
    if not layers or set(params) != set(names):
        return f"got {', '.join(sorted(params)) or 'nothing'}"
    entries = {"kernel", "bias", "norm"} if "norm" in layers[0] else {"kernel", "bias"}
    for name in names:
        expected = entries if name != "output" else {"kernel", "bias"}
        if set(params[name]) != expected:
            return f"{name} has {', '.join(sorted(params[name]))}, expected {', '.join(sorted(expected))}"
    num_features, width = layers[0]["kernel"].shape
    for index, name in enumerate(names):
        fan_in, fan_out = params[name]["kernel"].shape
        if fan_in != num_features + index * width or (name != "output" and fan_out != width):
            expected_shape = f"[{num_features + index * width}, {'C' if name == 'output' else width}]"
            return f"{name}/kernel is [{fan_in}, {fan_out}], expected {expected_shape}"
    return ""
