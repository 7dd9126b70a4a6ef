"""From a finding and the person it belongs to, to what a guideline would do next: rules, options, reasons."""
