"""`hikui sensitivity`: what each site of a model costs in each format, and what a budget would buy."""
