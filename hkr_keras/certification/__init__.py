"""How certificates come about: norms, rules of layers, composition, rounding, radii."""
