"""`pspinal-jax recipes`: what there is to train."""

from collections.abc import Sequence

from pspinal_jax.errors import UsageError
from pspinal_jax.recipes import list_recipes, load_recipe


def main(args: Sequence[str]) -> int:
    """Print a table of the recipes; returns the exit status."""
    if args and args[0] in ("-h", "--help"):
        print("usage: pspinal-jax recipes\n\nPrints name, row of the paper's table, model, and the paper's accuracy.")
        print("\nexample: pspinal-jax recipes")
        return 0
    if args:
        raise UsageError(f"recipes takes no arguments, got {' '.join(args)}")
    rows = [("recipe", "row", "model", "protocol", "paper's accuracy")]
    for name in list_recipes():
        recipe = load_recipe(name)
        published = recipe.card.published_accuracy
        accuracy = "-" if published is None else f"{published} %"
        rows.append((name, recipe.card.row, recipe.card.model, recipe.protocol, accuracy))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
