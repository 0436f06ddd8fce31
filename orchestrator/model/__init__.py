"""Networks, the LightningModule over them, and what optimises them."""
