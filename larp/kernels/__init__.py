"""Matrix products by the faster library where there is one."""
