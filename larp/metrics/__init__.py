"""Metrics of clips: Frechet distance, PSNR, SSIM, LPIPS, classifiers, and the protocols of published figures."""
