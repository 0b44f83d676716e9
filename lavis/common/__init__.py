"""What every room of the house shares: registry, configuration, errors, logging, process groups."""
