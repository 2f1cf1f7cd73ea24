"""Change how the parts of a network are joined: assemble, switch, inherit, swap attention."""
