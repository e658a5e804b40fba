"""Measures of clips: Frechet distance, PSNR, SSIM, LPIPS, and the protocols that travel with every figure."""
