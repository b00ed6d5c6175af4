"""Start-up kits: what a site allows, written into its kit, signed, and checked whenever the site starts."""
