"""Any Gymnasium environment with Box actions as a simulator, described by a YAML file (``docs/simulators.md``)."""
