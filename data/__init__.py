"""Where episodes come from and how training reads them."""
