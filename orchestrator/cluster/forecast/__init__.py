"""Before a run: does it fit, does it wait and behind what, or can it never start. Pure, over what a cluster told."""
